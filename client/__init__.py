"""TeeMate: many processes in one Intel SGX enclave."""
