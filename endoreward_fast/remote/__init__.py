"""The client: a model behind a URL, used in place of a loaded one."""
