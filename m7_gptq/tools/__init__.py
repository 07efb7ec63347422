"""What measures, draws or teaches this milestone from outside."""
