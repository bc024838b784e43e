"""The server: rewards over HTTP, from one model, for trainers on other machines."""
