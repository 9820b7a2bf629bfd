"""What writes this repository's pages and figures; not part of the package."""
