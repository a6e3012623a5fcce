"""The digits that travel with the package; `NOTICE.md` beside this file gives their licence."""
