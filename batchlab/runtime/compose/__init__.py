"""Complete architecture on one machine as a project of Docker Compose (compose/compose.yaml)."""
