"""A token of `kling-proxy token`, read with PyJWT, the library of the vendor's own sample."""

import subprocess
import tempfile
import time
import unittest

import jwt

from support import BINARY, environment

ACCESS_KEY = "0123456789abcdef0123456789ABCDEF"
SECRET_KEY = "fedcba9876543210FEDCBA9876543210"


def token():
    with tempfile.TemporaryDirectory() as home:
        return subprocess.run(
            [BINARY, "token"],
            env=environment(home, KLING_ACCESS_KEY=ACCESS_KEY, KLING_SECRET_KEY=SECRET_KEY),
            stdin=subprocess.DEVNULL,
            check=True,
            capture_output=True,
            text=True,
            timeout=30,
        ).stdout


class Token(unittest.TestCase):
    def test_it_is_what_the_vendors_sample_makes(self):
        now = int(time.time())
        printed = token()
        self.assertEqual(printed.count("\n"), 1)
        encoded = printed.strip()
        self.assertEqual(jwt.get_unverified_header(encoded), {"alg": "HS256", "typ": "JWT"})
        claims = jwt.decode(encoded, SECRET_KEY, algorithms=["HS256"], options={"require": ["iss", "exp", "nbf"]})
        self.assertEqual({name: type(value) for name, value in claims.items()}, {"iss": str, "exp": int, "nbf": int})
        self.assertEqual(claims["iss"], ACCESS_KEY)
        self.assertAlmostEqual(claims["exp"], now + 1800, delta=2)
        self.assertAlmostEqual(claims["nbf"], now - 5, delta=2)

    def test_another_key_does_not_verify_it(self):
        with self.assertRaises(jwt.InvalidSignatureError):
            jwt.decode(token().strip(), SECRET_KEY[::-1], algorithms=["HS256"])


if __name__ == "__main__":
    unittest.main()
