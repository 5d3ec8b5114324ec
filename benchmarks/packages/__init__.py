"""Published packages that are built on Lightning, run unedited on Loopwright and on Lightning itself."""
