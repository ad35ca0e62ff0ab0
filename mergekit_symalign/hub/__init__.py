"""Addresses on the Hugging Face Hub, and what it answers when something is wrong."""
