"""Whoever types what the pages say gets pods whose images exist: pushed, named, tagged as the chart asks."""

from __future__ import annotations

import re

import pytest
from ruamel.yaml import YAML
from tests.chart import CHART, ROOT, load_yaml, one

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
VERSION = load_yaml((CHART / "Chart.yaml").read_text(encoding="utf-8"))["appVersion"]
COMMANDS = [
    (page.name, command)
    for page in PAGES
    for command in re.findall(r"^    (\w.*)", page.read_text(encoding="utf-8").replace("\\\n", ""), re.MULTILINE)
]
IMAGE = re.compile(r"\bREGISTRY/finetune-(?:operator|trainer):(\S+)")


def test_every_image_has_the_tag_that_the_chart_asks_for() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert set(IMAGE.findall(text)) == {VERSION}


@pytest.mark.parametrize("builder", ["docker build", "buildah bud"])
def test_what_is_built_is_pushed(builder: str) -> None:
    commands = [command for page, command in COMMANDS if page == "images.md"]
    tool = builder.split()[0]
    built = {found[0] for line in commands if line.startswith(builder) and (found := IMAGE.search(line))}
    pushed = {found[0] for line in commands if line.startswith(f"{tool} push") and (found := IMAGE.search(line))}
    assert built == pushed == {f"REGISTRY/finetune-{target}:{VERSION}" for target in ("operator", "trainer")}


def test_every_installation_names_both_images() -> None:
    installs = [(page, command) for page, command in COMMANDS if command.startswith("helm install")]
    assert {page for page, _ in installs} == {"README.md", "install.md", "upgrade.md"}
    for page, command in installs:
        for target in ("operator", "trainer"):
            assert f"image.{target}.repository=REGISTRY/finetune-{target}" in command, (page, command)


def test_without_helm_one_name_is_replaced_twice_and_nobody_can_own_it() -> None:
    manifest = (ROOT / "deploy/install.yaml").read_text(encoding="utf-8")
    command = next(command for _, command in COMMANDS if "deploy/install.yaml" in command)
    found = re.match(r"sed 's#(.*)#(REGISTRY/)#' deploy/install.yaml \| kubectl apply --server-side -f -$", command)
    assert found
    assert found[1] == "registry.invalid/"  # RFC 2606: no such name will ever exist
    assert sorted(IMAGE.findall(manifest.replace(found[1], found[2]))) == [f'{VERSION}"', f'{VERSION}",']


@pytest.mark.parametrize("page", ["install.md", "upgrade.md"])
def test_whoever_applies_settings_without_helm_is_told_to_start_the_operator_again(page: str) -> None:
    documents = list(YAML(typ="safe").load_all((ROOT / "deploy/install.yaml").read_text(encoding="utf-8")))
    metadata = one(documents, "Deployment")["metadata"]
    restart = f"kubectl -n {metadata['namespace']} rollout restart deployment/{metadata['name']}"
    assert restart in [command for name, command in COMMANDS if name == page]


def test_without_helm_the_crd_is_upgraded_before_all_else() -> None:
    commands = [command for name, command in COMMANDS if name == "upgrade.md"]
    crd = commands.index("kubectl apply --server-side -f crds/")
    assert "deploy/install.yaml | kubectl apply --server-side -f -" in commands[crd + 1]
    assert "rollout restart" in commands[crd + 2]


@pytest.mark.parametrize("builder", ["docker build", "buildah bud"])
def test_the_password_of_a_mirror_goes_into_both_images_as_the_page_says(builder: str) -> None:
    commands = [command for page, command in COMMANDS if page == "images.md" and "PACKAGE_INDEX" in command]
    secret = next(found[1] for line in commands if (found := re.match(rf"{builder} --secret id=(\w+),src=", line)))
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")
    installs = [line for line in dockerfile.splitlines() if line.startswith("RUN") and "uv pip install" in line]
    mount = f"RUN --mount=type=secret,id={secret},target=/root/.netrc,required=false "
    assert [line.startswith(mount) for line in installs] == [True, True]
