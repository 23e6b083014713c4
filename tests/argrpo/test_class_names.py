"""Names of classes by each paper's rule, and the texts made of them."""

import pytest

from argrpo.class_names import class_names, class_texts
from argrpo.data_config import DataConfig


def test_each_papers_text_of_a_class() -> None:
    # AR-GRPO: no article, all names of the class (its IMAGENET_NAMES). LOO-FID: the first.
    ar_grpo = DataConfig(
        names="imagenet_synsets", aliases="all", template="a photo of {name}", classes=[0, 639]
    )
    assert class_texts(ar_grpo) == [
        (0, "a photo of tench, Tinca tinca"),
        (639, "a photo of maillot, tank suit"),
    ]
    loo_fid = DataConfig(names="imagenet_synsets", classes=[0, 639])
    assert class_texts(loo_fid) == [(0, "a photo of a tench"), (639, "a photo of a maillot")]


def test_the_article_follows_the_name() -> None:
    config = DataConfig(template="a photo of {article} {name}", classes=[207, 386])
    assert [text for _, text in class_texts(config)] == [
        "a photo of a Golden Retriever",
        "a photo of an African bush elephant",
    ]


@pytest.mark.parametrize("source", ["imagenet", "imagenet_synsets"])
def test_every_class_has_a_name(source) -> None:
    names = class_names(source)
    assert len(names) == 1000
    assert all(names)


def test_a_template_that_asks_for_something_else_is_refused() -> None:
    for template in ("a {nme}", "a {", "{0}"):
        with pytest.raises(ValueError, match=r"data\.template: expected a text with \{name\}"):
            class_texts(DataConfig(names="digits", template=template))
