"""The reference's weights as data: identity, pairing with the policy's, files."""
