"""The Auto Scaling engine: groups, policies, lifecycle hooks, instance refresh, and warm pools."""
