"""What the tests of this milestone and of later ones share."""
