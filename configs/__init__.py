"""Configuration: every option, and how YAML and overrides become one. Imports nothing of the other rooms."""
