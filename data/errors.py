"""What is said of an error that somebody else's library has raised."""


def first_line(error: object, length: int = 200) -> str:
    """The first line of its message, which may have many lines, or none."""
    return (str(error).strip().splitlines() or [""])[0][:length]
