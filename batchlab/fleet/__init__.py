"""Implementation of AWS's Auto Scaling: groups, policies, lifecycle hooks, instance refresh, and warm pools."""
