"""Generated stubs; see protos/retinue/error for the contract."""
