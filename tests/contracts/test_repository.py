"""The repository's own files: one version, tested versions that satisfy the requirements, links that resolve."""

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement

import megatron_slm

ROOT = Path(__file__).parents[2]


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_the_version_has_one_source() -> None:
    assert project()["project"]["dynamic"] == ["version"]
    assert project()["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "megatron_slm.__version__"}


def test_changelog_and_citation_name_the_version_and_its_date() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    version, date = headings[1].split(" - ")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert headings[0] == "Unreleased"
    assert version == citation["version"] == megatron_slm.__version__
    assert date == citation["date-released"]


def test_the_tested_versions_satisfy_the_requirements() -> None:
    found = project()["project"]
    tested = constraints()
    for line in [*found["dependencies"], *found["optional-dependencies"]["slow"]]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(tested[requirement.name.lower()]), line
    assert not [version for version in tested.values() if "+" in version]


def test_libraries_whose_private_names_are_used_have_an_upper_bound() -> None:
    bounded = {r.name for r in map(Requirement, project()["project"]["dependencies"]) if "<" in str(r.specifier)}
    assert bounded >= {"torch", "deepspeed", "transformers", "megatron-core"}


def pages() -> list[Path]:
    return [
        page
        for pattern in ("*.md", "docs/*.md", "examples/*.md", "examples/*/*.md")
        for page in sorted(ROOT.glob(pattern))
    ]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_between_pages_leads_to_a_file_and_a_heading() -> None:
    broken = []
    for page in pages():
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if "://" not in link and not (target.exists() and (not anchor or anchor in anchors(target))):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert not broken
