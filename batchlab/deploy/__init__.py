"""Deployment of a grid as a CloudFormation stack on AWS, from the plan of the stack to its deletion.

Invariant: the user sees every change of the stack before the change is made, and agrees to each deletion of data. The
CloudFormation template is `backends/aws/stack.yaml`.
"""
