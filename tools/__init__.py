"""Scripts of the project itself: goldens checked and condensed. Not part of the package."""
