"""The CloudFormation stack on AWS: plan, apply, status, destroy, releases, and leftovers.

Invariant: every change is shown before it is made, and data is deleted only with the user's agreement. The
CloudFormation template is `backends/aws/stack.yaml`.
"""
