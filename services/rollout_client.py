"""The client of the rollout servers."""

import asyncio
from typing import Any

import httpx

from services.errors import PeerError
from services.schemas import RolloutCompletion, RolloutInfo, RolloutSampling
from services.server_client import ServerClient, describe_transport_error, raise_for_problem
from services.wire import decode_completion, read_frames


class RolloutClient(ServerClient):
    """The rollout servers: completions of the student under the weights they hold."""

    async def info(self) -> list[RolloutInfo]:
        """One answer per server, in the order of the URLs."""
        return await self._get_info("/v1/rollouts/info", RolloutInfo)

    async def generate(
        self, prompts: list[list[int]], sampling: RolloutSampling, samples_per_prompt: int = 1, student_top_k: int = 0
    ) -> list[RolloutCompletion]:
        """Complete prompts, spread evenly over the servers.

        Returns:
            Completions ordered by prompt_index, then sample_index.

        Raises:
            PeerError: a server failed more often than there are attempts.
        """

        async def share(server: int) -> list[RolloutCompletion]:
            indices = range(server, len(prompts), len(self.urls))
            if not indices:
                return []
            body = {
                "prompts": [prompts[index] for index in indices],
                "samples_per_prompt": samples_per_prompt,
                "sampling": sampling.model_dump(),
                "student_top_k": student_top_k,
            }
            frames = await self._retrying(lambda: self._read_completions(self.urls[server], body))
            _check_complete(self.urls[server], frames, len(indices), samples_per_prompt)
            return [_with_prompt_index(frame, indices[frame.prompt_index]) for frame in frames]

        shares = await asyncio.gather(*(share(server) for server in range(len(self.urls))))
        completions = [completion for part in shares for completion in part]
        return sorted(completions, key=lambda c: (c.prompt_index, c.sample_index))

    async def generate_on(
        self, url: str, prompts: list[list[int]], sampling: RolloutSampling
    ) -> list[RolloutCompletion]:
        """Complete prompts on one server, without retries: what a canary needs."""
        body = {"prompts": prompts, "sampling": sampling.model_dump()}
        try:
            completions = await self._read_completions(url, body)
        except httpx.TransportError as error:
            raise PeerError(f"{url} cannot be reached: {describe_transport_error(error)}") from error
        return sorted(completions, key=lambda c: c.prompt_index)

    async def _read_completions(self, url: str, body: dict[str, Any]) -> list[RolloutCompletion]:
        async with self._http.stream("POST", f"{url}/v1/rollouts", json=body) as response:
            if not response.is_success:
                await response.aread()
                raise_for_problem(response)
            return [decode_completion(document) async for document in read_frames(response.aiter_bytes())]


def _check_complete(url: str, completions: list[RolloutCompletion], prompts: int, samples: int) -> None:
    got = sorted((c.prompt_index, c.sample_index) for c in completions)
    if got != [(prompt, sample) for prompt in range(prompts) for sample in range(samples)]:
        raise PeerError(
            f"{url} sent {len(got)} completions, not exactly one for each of {prompts} prompts x {samples} samples"
        )


def _with_prompt_index(completion: RolloutCompletion, prompt_index: int) -> RolloutCompletion:
    return RolloutCompletion(**{**vars(completion), "prompt_index": prompt_index})
