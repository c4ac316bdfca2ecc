"""The stack on AWS: what it is to be, how it gets there, what it is, and how it ends.

Invariant: nothing is changed that was not shown before, and no data is deleted that nobody has
agreed to lose. CloudFormation's template is `backends/aws/stack.yaml`.
"""
