"""The operations in Triton. Triton is imported by these modules alone, which `backend` loads where it is there."""
