"""What keeps the stages running and is no method: data, teachers, files, runs."""
