"""The CloudFormation stack on AWS: plan, apply, status, destroy, releases, and leftovers.

Invariant: the user sees every change before the change is made, and agrees to each deletion of data. The CloudFormation
template is `backends/aws/stack.yaml`.
"""
