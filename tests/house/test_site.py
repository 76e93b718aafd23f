"""The site's hook and its check; `make docs` builds the site itself."""

from __future__ import annotations

from types import SimpleNamespace

import check_site
import docs_site


def test_links_keep_their_goal_in_the_site():
    def mended(text, there):
        return docs_site.mend(text, there)

    assert mended("[a](docs/internals/maths.md#masks)", "internals/architecture.md") == "[a](maths.md#masks)"
    assert mended("[a](../../DESIGN.md#x)", "internals/maths.md") == "[a](architecture.md#x)"
    assert mended("![a](../benchmarks/results/race.png)", "index.md") == "![a](files/benchmarks/results/race.png)"
    assert mended("[the model](../benchmarks/scaling.py)", "scaling.md") == "the model (`benchmarks/scaling.py`)"
    assert mended("[setup.py](../setup.py)", "scaling.md") == "`setup.py`"
    for kept in ("[a](https://semver.org)", "[a](nothing.md)", "[a](masks.md)", "[a](#here)"):
        assert mended(kept, "index.md") == kept


def test_a_page_has_its_place_without_being_named():
    nav = [{"Start": ["index.md"]}, {"More": [{"A loss": "contributing/add-a-loss.md"}, "losses/index.md"]}]
    others = [{name: [f"{name}/index.md"]} for name in ("integrations", "results", "api", "internals")]
    docs_site.on_config(SimpleNamespace(nav=nav + others))
    assert "quickstart.md" in nav[0]["Start"] and nav[0]["Start"].count("index.md") == 1
    assert "losses/in-batch.md" in nav[1]["More"] and "contributing/add-a-loss.md" not in nav[1]["More"]


def test_what_a_module_takes_is_shown():
    text = docs_site.modules()
    assert "MSELoss(\n    size_average=None,\n    reduce=None,\n    reduction='mean',\n    *,\n    under=1.0," in text
    assert "`forward(anchor, positive, negative)`: [`triplet`](../losses/pairs.md#fusedloss.triplet)" in text


def test_faults_of_a_site_are_found(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.html").write_text(
        '<p id="x"><a href="../index.html">up</a><a href="https://semver.org">out</a>'
    )
    home = tmp_path / "index.html"
    home.write_text('<a href="a/b.html#x"></a><a href="#__search"></a><img src="data:,">')
    assert check_site.faults(tmp_path) == []
    home.write_text('<a href="a/b.html#y"></a><a href="c.html"></a><script src="//cdn/x.js"></script>')
    assert check_site.faults(tmp_path) == [
        "index.html: a/b.html#y has no such anchor",
        "index.html: c.html leads nowhere",
        "index.html: //cdn/x.js is loaded from elsewhere",
    ]
    assert check_site.faults(tmp_path / "a" / "nothing") != []
