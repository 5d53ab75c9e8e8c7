"""`python -m qwen1m_ext` is the `qwen1m` command."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
