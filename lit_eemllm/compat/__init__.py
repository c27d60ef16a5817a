"""What we use of other libraries beyond their documented interfaces, one module a library."""
