"""report.html: self-contained, readable, complete and safe, whatever the job was like."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.unit.trainer.report_builders import make_report

from finetune_api.report import Report, SampleRecord
from finetune_trainer import report_values as values
from finetune_trainer.report import render_html, write_report
from finetune_trainer.report_charts import MAXIMUM_COLUMNS

VOID = {"meta", "br", "line", "path", "rect", "circle"}


class Page(HTMLParser):
    """Elements, attributes and text of a page; an element that is not closed properly fails."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def series(self) -> list[str]:
        return [str(attrs["data-series"]) for tag, attrs in self.tags if tag == "g" and "data-series" in attrs]


def test_the_page_is_well_formed_and_shows_every_series() -> None:
    page = Page(render_html(make_report()))
    assert page.series() == [
        "training loss", "validation loss", "learning rate", "tokens/s", "gradient norm", "memory",
    ]  # fmt: skip


def test_the_page_needs_nothing_from_outside() -> None:
    html = render_html(make_report())
    page = Page(html)
    assert {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed", "base"} == set()
    assert [
        a for _, attrs in page.tags for a in attrs if a in {"src", "href", "srcset", "xlink:href"} or a.startswith("on")
    ] == []
    assert re.findall(r"https?://|url\(|@import|javascript:", html) == []


def test_the_page_tells_the_story_of_the_job() -> None:
    text = Page(render_html(make_report())).text
    for expected in (
        "QLoRA with FSDP full shard on 2 ranks (cpu), base model file:///models/stdlib-base",
        "base 6.150 (-64.6%); accuracy 12.0% → 61.6%",
        "16 = 4 micro-batch × 2 accumulation × 2 ranks",
        "training.microBatchSize 4 the largest divisor of 16 / 2 ranks that fits 2 GiB",
        "resources.accelerator is absent: this job trains on the CPU.",
        "quantized bytes rank 0 1 MiB rank 1 1023 KiB",
        "Serialize obj to a JSON formatted str.",
        "resumed from step 120",
        "skipped step-00000140: model.safetensors has a wrong sha256",
        "adapter_model.safetensors 833 KiB " + "3a" * 32,
        "dropped: too long 12",
        "masked token share 61.3%",
    ):
        assert expected in text


def test_hostile_text_stays_text() -> None:
    attack = "</pre><script>alert('1')</script><img src=x onerror=alert(1)>\"'&"
    plan = make_report().plan.model_copy(update={"warnings": (attack,), "artifact_prefix": attack})
    report = make_report(
        job={"name": attack, "namespace": attack, "uid": attack},
        plan=plan,
        spec={"model": {"uri": attack}, attack: attack},
        environment={attack: attack},
        dataset={attack: {attack: attack}},
        self_check=({"rank": 0, attack: attack},),
        samples=(SampleRecord(prompt=attack, reference=attack, before=attack, after=attack),),
        attempts=({attack: attack},),
        artifact={"uri": attack, "files": [{"path": attack, "bytes": 1, "sha256": attack}]},
        started_at=attack,
        finished_at=attack,
    )
    page = Page(render_html(report))
    assert {tag for tag, _ in page.tags} & {"script", "img"} == set()
    assert page.text.count("<script>alert('1')</script>") >= 20


@pytest.mark.parametrize("steps", [1, 2, 7, 100_000])
def test_a_run_of_any_length_is_drawn_in_bounded_size(steps: int) -> None:
    html = render_html(make_report(steps))
    page = Page(html)
    cells = [attrs for tag, attrs in page.tags if tag == "rect"]
    assert len(page.series()) == 6
    assert len(cells) <= 5 * MAXIMUM_COLUMNS
    assert len(html) < 700_000
    coordinates = [
        float(n) for _, attrs in page.tags if attrs.get("d") for n in re.findall(r"-?[\d.]+", str(attrs["d"]))
    ]
    assert min(coordinates) >= 0
    assert max(coordinates) <= 1040


def test_a_spike_of_one_step_in_a_hundred_thousand_stays_visible() -> None:
    report = make_report(100_000)
    spiked = [s.model_copy(update={"loss": 30.0}) if s.step == 70_000 else s for s in report.steps]
    titles = Page(render_html(report.model_copy(update={"steps": tuple(spiked)}))).texts
    assert [t for t in titles if t.startswith("steps 69,") and "training loss" in t and t.endswith("to 30)")] != []


def test_a_job_without_validation_says_what_is_therefore_unknown() -> None:
    page = Page(render_html(make_report(evaluations=(), samples=())))
    assert "validation loss" not in page.series()
    assert (
        "No validation data: the job has no dataset.validation , so whether it generalises is not known." in page.text
    )


def test_a_job_that_ended_before_its_first_step_still_has_a_report() -> None:
    report = make_report(steps=0, evaluations=(), self_check=(), artifact={}, dataset={}, environment={}, metrics={})
    page = Page(render_html(report))
    assert page.series() == []
    assert "No optimizer step was recorded." in page.text


def test_an_early_stop_names_the_published_step() -> None:
    page = Page(render_html(make_report(stopped_early=True, best_step=160)))
    assert "Stopped early, best step 160" in page.text
    assert "best: step 160" in page.text
    assert "Validation loss 2.303" in page.text


def test_report_json_gives_the_same_report_back(tmp_path: Path) -> None:
    report = make_report(30)
    files = write_report(report, tmp_path / "new" / "directory")
    assert sorted(path.name for path in files.json_path.parent.iterdir()) == ["report.html", "report.json"]
    assert Report.model_validate_json(files.json_path.read_text()) == report
    assert "learningRate" in json.loads(files.json_path.read_text())["steps"][0]
    assert files.html_path.read_text() == render_html(report)


def test_equal_ranks_are_told_once_and_odd_ones_by_number() -> None:
    checks = [{"rank": rank, "device": "cuda", "kernel": "sdpa" if rank != 5 else "math"} for rank in range(8)]
    assert values.compare_ranks(checks) == [
        ("device", [("all ranks", "cuda")]),
        ("kernel", [("ranks 0–4, 6–7", "sdpa"), ("rank 5", "math")]),
    ]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("peakBytes", 1_610_612_736, "1.5 GiB"),
        ("loadSeconds", 3725.0, "1 h 02 min"),
        ("maskedTokenShare", 0.25, "25.0%"),
        ("trainTokens", 1_234_567, "1,234,567"),
        ("learningRate", 0.0002, "2e−4"),
        ("packed", True, "yes"),
        ("digest", None, "none"),
        ("targets", ["q_proj", "v_proj"], "q_proj, v_proj"),
    ],
)
def test_a_value_is_worded_with_its_unit(key: str, value: object, expected: str) -> None:
    assert values.show(value, key) == expected
