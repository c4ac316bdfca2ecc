"""batchlab: batch work on AWS, the same grid on a laptop, in a simulator and in production."""
