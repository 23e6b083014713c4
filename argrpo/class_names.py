"""Names of classes, from the metadata of libraries, and the texts that are made of them."""

from argrpo.data_config import ClassNames, DataConfig

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_VOWELS = "aeiou"


def class_names(source: ClassNames, aliases: str = "first") -> list[str]:
    """Names by class id.

    Args:
        source: digits; imagenet, whose names open_clip has made to tell classes apart; or
            imagenet_synsets, the data set's own, as timm keeps them.
        aliases: of a class with several names, its first, or all of them separated by commas.
    """
    if source == "digits":
        return list(DIGIT_NAMES)
    if source == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES

        return list(IMAGENET_CLASSNAMES)
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    names = [info.index_to_description(label) for label in range(info.num_classes())]
    return names if aliases == "all" else [name.partition(",")[0].strip() for name in names]


def class_texts(config: DataConfig) -> list[tuple[int, str]]:
    """Class ids to train on, and the text of each.

    Raises:
        ValueError: a class id without a name, or a template that asks for something else.
    """
    names = class_names(config.names, config.aliases)
    classes = list(range(len(names))) if config.classes is None else config.classes
    outside = [c for c in classes if not 0 <= c < len(names)]
    if outside or not classes:
        raise ValueError(
            f"data.classes: expected ids from 0 to {len(names) - 1}, "
            f"got {outside[0] if outside else 'none'}"
        )
    return [(c, _text(config.template, names[c])) for c in classes]


def _text(template: str, name: str) -> str:
    article = "an" if name[:1].lower() in _VOWELS else "a"
    try:
        return template.format(name=name, article=article)
    except (LookupError, ValueError) as error:
        raise ValueError(
            f"data.template: expected a text with {{name}} and {{article}}, got {template!r}"
        ) from error
