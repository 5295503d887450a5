"""Whoever types what the pages say gets pods whose images exist: pushed, named, tagged as the chart asks."""

from __future__ import annotations

import re

import pytest
from tests.chart import CHART, ROOT, load_yaml

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
