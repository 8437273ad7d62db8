"""How far does training go in length: memory, speed, and a loss that falls."""
