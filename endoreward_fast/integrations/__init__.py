"""Integrations with trainers and clusters. Import the one you need; the package imports none of them."""
