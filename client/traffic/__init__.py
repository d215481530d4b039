"""What clients and the broker say to each other, for people who look: live, recorded, played again.

`description` says what a message is, the same wherever it was seen; `diagnostic` writes it down;
`concealing` takes the secrets out before anything is shown or kept.
"""
