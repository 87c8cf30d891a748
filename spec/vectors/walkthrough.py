"""The walkthrough."""


def text() -> str:
    return ""
