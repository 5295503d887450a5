module finetune.dev/tools/probe

go 1.25
