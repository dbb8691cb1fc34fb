"""A request of each kind and an answer, as a real server takes and gives them (tests/integration/test_teacher_openapi.py)."""

from typing import Any

REQUEST_EXAMPLES: dict[str, Any] = {
    "token_ids": {
        "summary": "Token ids: the last of three is scored, with the 2 likeliest candidates",
        "value": {"sequences": [{"token_ids": [50, 43, 61], "prompt_length": 2}], "top_k": 2},
    },
    "text": {
        "summary": "A prompt and its completion as text",
        "value": {"sequences": [{"prompt": "47+85=", "completion": "132"}], "top_k": 3, "temperature": 0.7},
    },
    "messages": {
        "summary": "A conversation, whose last message is scored",
        "value": {
            "sequences": [
                {"messages": [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}]},
            ],
            "top_k": 1,
        },
    },
    "support_ids": {
        "summary": "Further tokens of the caller's choice: two for each of two rows",
        "value": {
            "sequences": [{"token_ids": [50, 43, 50, 61], "prompt_length": 2, "support_ids": [[48, 49], [61, 10]]}],
            "top_k": 1,
            "logprob_dtype": "float16",
        },
    },
}

ANSWER_EXAMPLE: dict[str, Any] = {
    "protocol": 1,
    "model": "/models/teacher",
    "fingerprint": "8c1f0a6de2b74935",
    "temperature": 1.0,
    "top_k": 2,
    "sequences": [
        {
            "token_ids": [61],
            "token_logprobs": [-0.25],
            "topk_ids": [[61, 43]],
            "topk_logprobs": [[-0.25, -1.75]],
            "tail_logprobs": [-3.03],
            "entropies": [0.84],
        }
    ],
}
