"""The Python package `requests` through the proxy, without any credential."""

import time
import unittest

import requests

from support import proxy

PATH = "/v1/videos/text2video"


class Requests(unittest.TestCase):
    def setUp(self):
        self.urls = self.enterContext(proxy())
        self.session = self.enterContext(requests.Session())
        self.session.trust_env = False

    def create(self, prompt, **headers):
        body = {"model_name": "kling-v2-6", "prompt": prompt}
        return self.session.post(self.urls["proxy"] + PATH, json=body, headers=headers, timeout=30)

    def test_a_task_is_created_polled_and_downloaded(self):
        created = self.create("a cat").json()
        self.assertEqual((created["code"], created["message"]), (0, "SUCCEED"))
        data = created["data"]
        deadline = time.monotonic() + 30
        while data["task_status"] in ("submitted", "processing"):
            self.assertLess(time.monotonic(), deadline, data)
            time.sleep(0.1)  # a poll's interval, as in any client: the API has no way to wait for a task
            data = self.session.get(f"{self.urls['proxy']}{PATH}/{data['task_id']}", timeout=30).json()["data"]
        self.assertEqual(data["task_status"], "succeed", data)
        download = self.session.get(data["task_result"]["videos"][0]["url"], timeout=30)
        self.assertEqual((download.status_code, download.headers["content-type"]), (200, "video/mp4"))
        self.assertEqual(download.content[4:8], b"ftyp")

    def test_whatever_credential_the_client_sends_is_replaced(self):
        for credential in ("Bearer no-token", "Basic bm86bm8=", ""):
            with self.subTest(credential):
                answer = self.create("a cat", Authorization=credential)
                self.assertEqual((answer.status_code, answer.json()["code"]), (200, 0), answer.text)

    def test_an_error_says_what_happened_and_what_to_do(self):
        answer = self.create("sandbox:1102", **{"x-request-id": "request-of-a-test"})
        body = answer.json()
        self.assertIsInstance(body.pop("request_id"), str)
        self.assertEqual(
            body,
            {
                "code": 1102,
                "message": "Account balance not enough",
                "error": {
                    "type": "resource_pack_depleted",
                    "source": "upstream",
                    "upstream_status": 429,
                    "definition": "Account exception",
                    "explanation": "Resource pack depleted or expired (prepaid scenario)",
                    "solution": "Purchase additional resource packages, or activate the post-payment service (if available)",
                    "retryable": False,
                    "attempts": 1,
                },
            },
        )
        names = ("content-type", "kling-proxy-error", "x-should-retry", "retry-after", "kling-proxy-request-id")
        self.assertEqual(
            (answer.status_code, [answer.headers.get(name) for name in names]),
            (429, ["application/json", "resource_pack_depleted", "false", None, "request-of-a-test"]),
        )

    def test_a_new_standard_path_refuses_an_access_key(self):
        answer = self.session.post(
            self.urls["proxy"] + "/text-to-video/kling-3.0", json={"prompt": "a cat"}, timeout=30
        )
        self.assertEqual((answer.status_code, answer.json()["code"]), (401, 1002), answer.text)


if __name__ == "__main__":
    unittest.main()
