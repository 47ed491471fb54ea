"""What tests of several trees share."""
