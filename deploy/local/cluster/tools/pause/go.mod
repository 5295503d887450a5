module finetune.dev/tools/pause

go 1.25
