"""What a run will take, before its first step: memory counted, time measured dry, settings chosen."""
