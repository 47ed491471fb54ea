"""The data plane native: this process carries the bytes of TCP and memcached."""
