"""What the examples share: numbers in a range as the types of flags."""


def number(kind, low, high, text):
    """A type for argparse: `kind` from `low` on, below `high`; errors call it `text`."""

    def parse(word):
        if not low <= kind(word) < high:
            raise ValueError
        return kind(word)

    parse.__name__ = text  # argparse says it where the word is no such number
    return parse
