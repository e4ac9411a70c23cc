"""What the tests share: the cases, the float64 truth, the tolerance, and how to run one row of the kernel table."""
