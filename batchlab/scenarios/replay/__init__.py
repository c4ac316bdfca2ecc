"""A scenario lived through in real time, on a real grid."""
