"""The page without a browser: what it says, that it is one file, and that nothing in it runs."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from align.report.frontier import _far_away
from align.report.page import _used, interval, number, write_report
from align.report.runs import read_run
from align.report.samples import MAX_SHOWN, difference
from align.report.verdicts import capital, turned, verdicts
from align.types import AlignError
from tests.report.conftest import write_run, write_suite

VOID = {"meta", "link", "br", "input", "img", "hr"}


class Outline(HTMLParser):
    """Tags, ids, headings, and whether every element was closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


@pytest.fixture
def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def test_the_verdict_comes_first_and_says_what_is_wrong(text: str) -> None:
    sections = re.findall(r'<section id="(\w+)"', text)
    assert sections == ["verdict", "runs", "evaluation", "frontier", "reward", "curves", "samples"]
    verdict = text.partition('<section id="verdict"')[2].partition("</section>")[0]
    assert "Worse by gold reward: " in verdict.partition('class="evidence"')[0]
    words = " ".join(re.sub("<[^>]*>", " ", verdict).split())
    assert "Reward +0.200 0.100 to 0.300 better, p = .001" in words
    assert '<td class="worse">worse, p = .002</td>' in verdict
    assert '<th scope="col">against sft</th>' in verdict
    assert "not certain at equal length" in verdict
    assert "over-optimised" in verdict
    assert "1.60 nats of KL per response" in verdict
    assert "not shown to be better than chance and than length" in verdict
    assert "prefers repeated answers on 70%" in verdict


def test_a_model_that_is_far_away_does_not_press_the_others_into_a_corner() -> None:
    def points(*kls: float) -> list[dict[str, object]]:
        return [{"name": str(kl), "kl": kl} for kl in kls]

    assert [p["kl"] for p in _far_away(points(80.9, 0.0, 1.2, 0.7))] == [80.9]
    assert _far_away(points(5.9, 0.0, 1.2, 0.7)) == []
    assert _far_away(points(4.0, 0.0, 0.1)) == []  # not far in nats
    assert _far_away(points(0.0, 80.0)) == []  # nothing else would be left to compare


def test_rows_that_were_used_are_told() -> None:
    assert _used({"train_rows": 1600, "test_rows": 16}) == "1,600 rows used, 16 held out"
    assert _used({"train_rows": 5, "test_rows": 0}) == "5 rows used"
    assert _used({"prompts": 400}) == ""


def test_it_is_one_file_without_a_network(text: str) -> None:
    outline = Outline(text)
    for tag, attributes in outline.tags:
        for name in ("src", "href", "xlink:href", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:,")), (tag, name, value)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    without_names = re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    assert "http://" not in without_names
    assert "https://" not in without_names


def test_outputs_are_escaped(text: str) -> None:
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(&#39;out&#39;)&lt;/script&gt;" in text
    assert "{{ 7 * 7 }}" in text  # no template either
    assert "<b>And</b>" not in text
    assert [tag for tag, _ in Outline(text).tags].count("script") == 1


def test_the_escaping_test_rejects(suite: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Without autoescape the script stands in the page: the test above can fail."""
    from align.report import page

    original = page.Environment
    monkeypatch.setattr(
        page, "Environment", lambda **options: original(**options | {"autoescape": False})
    )
    broken = write_report([str(suite)], str(tmp_path / "broken.html"))
    assert "<script>alert" in broken.read_text(encoding="utf-8")


HOSTILE = "</script><img src=x onerror=alert(1)>'\"&lt;|$x^{$ {{ 7 * 7 }} \x1b[31m\u202e"


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Names of models, metrics, files, keys and a run that would end an element or an attribute."""
    folder = tmp_path_factory.mktemp("hostile")
    suite = write_suite(folder / "runs" / "tiny")
    place = suite / "eval" / "eval.json"
    text = place.read_text()
    for name in ("ppo", "sft", "nrefs:1"):
        text = text.replace(f'"{name}', f'"{json.dumps(HOSTILE + name)[1:-1]}')
    place.write_text(text)
    for path in (suite / "eval" / "outputs").glob("*.jsonl"):
        if path.stem in ("ppo", "sft"):
            path.unlink()
    rows = [{"step": i, HOSTILE: 0.5, f"eval_{HOSTILE}": 0.2 * i, "kl": 9.0 * i} for i in (1, 2, 3)]
    write_run(
        folder / "run<b>\x1b", "ppo", metrics=rows, status=HOSTILE, command=HOSTILE, seed=HOSTILE,
        data={HOSTILE: [{"path": HOSTILE, "sha256": HOSTILE, "rows_read": 1, "rows_kept": 1}]},
        held_out={HOSTILE: 1.0}, config=json.dumps({"model": HOSTILE, HOSTILE: HOSTILE}),
    )  # fmt: skip
    return write_report([str(suite)], str(folder / "p.html")).read_text(encoding="utf-8")


def test_names_are_escaped_everywhere(hostile_page: str) -> None:
    outline = Outline(hostile_page)
    assert (outline.wrong, outline.open) == ([], [])
    tags = [tag for tag, _ in outline.tags]
    assert tags.count("script") == 1
    assert "img" not in tags
    assert not [name for _, found in outline.tags for name in found if name.startswith("on")]
    assert hostile_page.count("&lt;img src=x onerror=alert(1)&gt;") > 10
    assert "$x^{$" in hostile_page  # no formula to matplotlib, and still there
    assert "{{ 7 * 7 }}" in hostile_page
    assert not {"\x1b", "\u202e"} & set(hostile_page)
    assert r"\u001b[31m\u202e" in hostile_page


def test_a_policy_lets_the_pages_own_script_run_and_nothing_else(hostile_page: str) -> None:
    (script,) = re.findall(r"<script>(.*?)</script>", hostile_page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policies = [a for tag, a in Outline(hostile_page).tags if "http-equiv" in a]
    assert [p["http-equiv"] for p in policies] == ["Content-Security-Policy"]
    rules = str(policies[0]["content"]).split("; ")
    assert rules[:2] == ["default-src 'none'", f"script-src 'sha256-{digest}'"]
    assert {"connect-src 'none'", "img-src data:", "base-uri 'none'"} <= set(rules)
    head = hostile_page.partition("<script>")[0]
    assert "Content-Security-Policy" in head.partition("<style>")[0]


def test_it_is_well_formed_and_accessible(text: str) -> None:
    outline = Outline(text)
    assert outline.wrong == []
    assert outline.open == []
    ids = [a["id"] for _, a in outline.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for name in re.findall(r'(?:url\(#|href="#|aria-labelledby=")([^)"]+)', text):
        assert name in ids
    headings = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch("h[1-6]", tag)]
    assert headings.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(headings))
    figures = [a for tag, a in outline.tags if tag == "svg"]
    assert len(figures) > 8
    assert all(a["role"] == "img" and a["aria-labelledby"] in ids for a in figures)
    assert all("scope" in a for tag, a in outline.tags if tag == "th")
    (html,) = [a for tag, a in outline.tags if tag == "html"]
    assert html["lang"] == "en"
    for tag in ("main", "nav", "header"):
        assert tag in [t for t, _ in outline.tags]


def test_many_prompts_are_cut_to_the_telling_ones(text: str) -> None:
    assert text.count('class="sample"') == MAX_SHOWN
    assert f"{200 - MAX_SHOWN} are in the run" in text


def test_the_gold_reward_turns(text: str) -> None:
    frontier = text.partition('<section id="frontier"')[2].partition("</section>")[0]
    # one group for each model here, so no curve has four points; best of n is in the table
    assert "turns at about" not in frontier
    assert "best of 4 samples" in frontier


def test_a_run_that_goes_on_and_no_evaluation(make_run, tmp_path: Path) -> None:
    folder = make_run("going", "sft", status="running", metrics=[{"step": 1, "loss": 2.0}])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # it is being written
    text = write_report([str(folder)], str(tmp_path)).read_text(encoding="utf-8")
    assert "No run here has been measured" in text
    assert 'class="badge running"' in text


def test_wrong_places_are_one_line(tmp_path: Path, make_run) -> None:
    with pytest.raises(AlignError, match="no such folder"):
        write_report([str(tmp_path / "nothing")], "x.html")
    with pytest.raises(AlignError, match="no run in it"):
        write_report([str(tmp_path)], "x.html")
    folder = make_run("a", "sft")
    with pytest.raises(AlignError, match="name another --output"):
        write_report([str(folder)], str(folder / "config.yaml" / "x.html"))


def test_differences_by_words() -> None:
    pieces = difference("the dog ran fast", "the cat ran")
    assert "".join(t for kind, t in pieces if kind != "missing") == "the dog ran fast"
    assert ("missing", "cat ") in pieces
    assert difference("a b", None) == [("same", "a b")]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, ""),
        (0.12345, "0.123"),
        (1234, "1,234"),
        (123.4, "123"),
        (48.0, "48.0"),
        (99.96, "100"),
        (0.0, "0"),
        (1.2e-7, "0"),
        (1e-5, "1e-05"),
        ("by hand", "by hand"),
    ],
)
def test_numbers(value: float | None, shown: str) -> None:
    assert number(value) == shown
    assert interval((0.1, 0.25)) == "0.100 to 0.250"


def test_a_comparison_turned_round() -> None:
    test = {
        "a": "sft",
        "b": "base",
        "metric": "bleu",
        "difference": 3.0,
        "ci95": [1.0, 4.0],
        "p": 0.001,
        "p_randomization": 0.001,
        "num_prompts": 50,
        "num_prompts_needed": 20,
        "verdict": "better, p = .001",
        "at_equal_length": {"difference": 2.0, "ci95": [0.5, 3.0]},
    }
    found = turned(test)
    assert (found["a"], found["b"], found["difference"]) == ("base", "sft", -3.0)
    assert found["ci95"] == [-4.0, -1.0]
    assert found["verdict"] == "worse, p = .001"
    assert found["at_equal_length"]["ci95"] == [-3.0, -0.5]
    assert turned(found) == test
    assert [capital(t) for t in ("gold reward", "chrF", "BLEU")] == ["Gold reward", "chrF", "BLEU"]


def test_evidence_has_its_outcome_in_a_field(suite: Path) -> None:
    run = read_run(suite / "eval", suite)
    (ppo, *_) = [v for v in verdicts(run) if v.title.startswith("ppo")]
    assert ppo.baseline == "sft"
    assert [x.outcome for x in ppo.evidence] == ["better", "", "worse"]


def test_seeds_of_one_model_have_one_verdict(suite: Path, tmp_path: Path) -> None:
    place = suite / "eval" / "eval.json"
    results = json.loads(place.read_text())
    (ppo,) = [m for m in results["models"] if m["name"] == "ppo"]
    results["models"] = [m for m in results["models"] if m["name"] == "sft"]
    results["models"] += [ppo | {"name": f"ppo#{i}", "kl": 3.0 + 87 * i} for i in (0, 1)]
    place.write_text(json.dumps(results))
    text = write_report([str(suite)], str(tmp_path / "p.html")).read_text(encoding="utf-8")
    verdict = text.partition('<section id="verdict"')[2].partition("</section>")[0]
    assert verdict.count("<h3>ppo") == 1
    assert "<h3>ppo against sft</h3>" in verdict
    assert "for 46.50 nats" in verdict


def test_the_doctors_findings_are_told(make_run, tmp_path: Path) -> None:
    rows = [{"step": i, "kl": 5.0 * i, "score_mean": 0.1 * i} for i in range(1, 13)]
    folder = make_run("ppo", "ppo", metrics=rows)
    text = write_report([str(folder)], str(tmp_path / "p.html")).read_text(encoding="utf-8")
    findings = text.partition('class="findings"')[2].partition("</ul>")[0]
    assert "nats per response, over its budget" in findings
    assert "(kl_over_budget)" in findings
