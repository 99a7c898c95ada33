"""The paper, exact: everything in log-SNR lambda, every formula with its equation number, every claim held to a closed form."""
