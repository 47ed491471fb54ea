"""Generated stubs; see protos/retinue/error/v1 for the contract."""
