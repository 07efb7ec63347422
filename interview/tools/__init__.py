"""What works out the numbers of the interview pages."""
