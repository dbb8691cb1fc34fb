"""Options of several sections that contradict each other, or that another one makes meaningless."""

import pytest

from tests.unit.services.config.commands import COMPLETE, assert_refused, assert_taken, refused, resolved

REFUSED = {
    "--loss.support student_topk --loss.top_k 99": "loss.top_k = 99 ... rollout.max_logprobs = 64",
    "--teacher.max_top_k 8": "loss.top_k = 32 ... teacher.max_top_k = 8",
    "--rollout.max_model_len 64 --sampling.max_new_tokens 64": (
        "max_new_tokens = 64 ... rollout.max_model_len = 64 ... lower the one or raise the other"
    ),
    "--evaluation.max_new_tokens 90 --rollout.max_model_len 90 --sampling.max_new_tokens 9": "= 90",
    "--pipeline.min_rollout_servers 2": (
        "pipeline.min_rollout_servers = 2 is above the number of rollout servers, 1 (rollout.num_servers); lower the one or raise"
    ),
    '--pipeline.min_rollout_servers 3 --rollout_client.urls ["http://a:1","http://b:1"]': "2 (rollout_client.urls)",
    "--rollout.port 8101": "rollout.port and teacher.port are both 8101 ... different ports",
    "--rollout.cuda_devices first": "rollout.cuda_devices = 'first' ... no GPU ... nvidia-smi -L",
    "--teacher.cuda_devices 0,GPU-12": "teacher.cuda_devices = '0,GPU-12' ... mixes numbers and UUIDs",
    "--rollout.cuda_devices 0 --rollout.tensor_parallel_size 2": (
        "rollout.tensor_parallel_size = 2 ... rollout.cuda_devices = '0' ... name more, or lower it"
    ),
    "--rollout.cuda_devices 0,1 --rollout.tensor_parallel_size 2 --rollout.data_parallel_size 3": (
        "tensor_parallel_size = 2 and rollout.data_parallel_size = 3 need 6 GPUs ... name more, or lower it"
    ),
    "--teacher.engine vllm --teacher.cuda_devices 0 --teacher.tensor_parallel_size 2": (
        "teacher.tensor_parallel_size = 2 need 2 GPUs, but teacher.cuda_devices = '0' ... name more, or lower it"
    ),
    "--up.restart_trainer 2 --output.save_every_steps 0": (
        "up.restart_trainer = 2 ... output.save_every_steps = 0 makes none ... set it above 0"
    ),
    "--up.restart_servers -1": "up.restart_servers: Input should be greater than or equal to 0",
    "--up.restart_backoff_s 0": "up.restart_backoff_s: Input should be greater than 0",
    "--student.dtype bfloat16 --student.compute_dtype float32": (
        "student.compute_dtype = float32 ... student.dtype = bfloat16"
    ),
    "--student.dtype float16": "student.dtype = float16 ... underflow ... use float32",
    "--teacher_client.protocol vllm": "teacher_client.protocol = vllm without teacher_client.urls ... give their URLs",
    '--teacher_client.named {"maths":[]}': "teacher_client.named.maths = [] has no server ... leave the name out",
    '--teacher_client.named {"maths":["http://a:1","http://b:2/"],"code":["http://c:3","http://b:2"]}': (
        "teacher_client.named.code and teacher_client.named.maths both name http://b:2 ... give each its own server"
    ),
    '--teacher_client.named maths=["http://a:1"] --teacher_client.urls ["http://a:1/"]': (
        "teacher_client.named.maths and teacher_client.urls both name http://a:1"
    ),
    "--data.teacher_column tutor": "data.teacher_column = tutor would be ignored ... teacher_client.named names no",
    '--teacher_client.named maths=["http://a:1"] --data.teacher_column answer': (
        "data.teacher_column = answer is also the column of data.answer_column ... a column of its own"
    ),
    '--teacher_client.named maths=["http://a:1"] --data.prompt_column teacher': (
        "teacher_column = teacher ... data.prompt_column"
    ),
    "--data.answer_column prompt": "data.answer_column = prompt is also the column of data.prompt_column",
    "--data.messages_column prompt": "data.messages_column = prompt ... data.prompt_column",
    "--data.prompt_column tools": "data.prompt_column = tools is also the column of a conversation's tools",
    '--data.last_assistant_turn drop --data.chat_template_kwargs {"continue_final_message":true}': (
        "data.last_assistant_turn = drop would be ignored ... continue_final_message"
    ),
    "--data.held_out 0.1 --data.eval_path e.jsonl": "data.held_out = 0.1 and data.eval_path = e.jsonl both give held-out rows",
    "--data.held_out 9 --data.eval_split test": "data.held_out = 9 and data.eval_split = test ... leave one of them out",
    "--data.held_out 1.5": "data.held_out = 1.5 is neither a number of rows nor a part of them ... whole number",
    "--data.held_out 0": "data.held_out: Input should be greater than 0",
    "--data.eval_split train": "data.eval_split = train is the split that is trained on ... data.held_out",
    "--data.split a --data.eval_split a": "data.eval_split = a is the split that is trained on",
    '--data.more_paths {"d.jsonl":1}': "data.more_paths names d.jsonl, which is data.path ... once",
    '--data.more_paths {"e.jsonl":0}': "data.more_paths.e.jsonl: Input should be greater than 0",
    '--data.filters {"level":{"least":2}}': "data.filters.level = {'least': 2} must be a table of min, max, not",
    '--data.filters {"level":{}}': "data.filters.level = {} must be a table of min, max, not",
    '--data.filters {"level":{"min":"2"}}': "data.filters.level.min = '2' must be a number",
    '--data.filters {"level":{"max":true}}': "data.filters.level.max = True must be a number",
    '--data.filters {"level":{"min":3,"max":2}}': "data.filters.level.min = 3 is above its max = 2",
    '--data.filters {"level":[]}': "data.filters.level = [] lets no row pass",
    '--data.filters {"level":[[1]]}': "data.filters.level: [1] is no single value",
    '--data.filters {"level":{"not":[{}]}}': "data.filters.level.not: {} is no single value",
    "--teacher.tensor_parallel_size 2": "tensor_parallel_size = 2 would be ignored ... engine = transformers",
    '--teacher.engine_args {"seed":1}': "teacher.engine_args ... would be ignored ... engine = transformers",
    "--teacher.engine vllm --teacher.device cpu": "teacher.device = cpu would be ... teacher.engine = vllm",
    "--teacher.float32_head false": "teacher.float32_head = False would be ignored ... engine = transformers",
    "--pipeline.epochs 2": "pipeline.steps = 1 ... pipeline.epochs = 2 ... give one of them",
    "--optimizer.warmup_steps 5": "optimizer.warmup_steps = 5 ... pipeline.steps = 1 ... fewer steps",
    "--optimizer.schedule constant --optimizer.min_lr_ratio 0.1": (
        "optimizer.min_lr_ratio = 0.1 would be ignored ... optimizer.schedule = constant"
    ),
    '--teacher_client.urls ["10.0.0.5:8101"]': "teacher_client.urls: '10.0.0.5:8101' must begin with http://",
    '--rollout_client.urls ["https://a","b:1"]': "rollout_client.urls: 'b:1' must begin with http://",
    '--teacher_client.named maths=["a:1"]': "teacher_client.named.maths: 'a:1' must begin with http://",
    '--rollout_client.urls ["http://a","HTTP://A:80/"]': "rollout_client.urls names http://a twice ... once",
    '--rollout_client.urls ["http://a:1/students"]': "has the path '/students' ... leave it out",
    "--rollout_client.urls http://me:s3cret@a:1": "rollout_client.urls: 'http://...@a:1' has a user or password",
    '--teacher_client.named {"maths":"http://me:s3cret@a:1"}': (
        "teacher_client.named.maths ... list ... (got 'http://...@a:1')"
    ),
    '--rollout_client.urls ["http://[0::1]:1"] --teacher_client.urls ["http://[::1]:1"]': (
        "teacher_client.urls and rollout_client.urls both name http://[::1]:1 ... give each its own server"
    ),
    "--rollout.host fe80::1%eth0": "rollout.host = fe80::1%eth0 ... vLLM",
    "--weight_sync.master_address ::": "weight_sync.master_address = :: ... give one of this machine",
    "--weight_sync.master_address [::1] --weight_sync.backend nccl": (
        "weight_sync.master_address = ::1 ... weight_sync.backend = gloo"
    ),
    "--weight_sync.backend nccl --student.cuda_devices 1,0 --rollout.cuda_devices 2,1": (
        "nccl cannot connect the trainer and the rollout server on one card ... give them different GPUs"
    ),
    '--rollout.float32_head true --rollout.engine_args ["--quantization=fp8"]': (
        "rollout.float32_head = True with --quantization=fp8 in rollout.engine_args ... leave one of the two out"
    ),
    '--teacher.engine vllm --teacher.float32_head true --teacher.engine_args quantization="fp8"': (
        "teacher.float32_head = True with quantization in teacher.engine_args ... leave one of the two out"
    ),
}


@pytest.mark.parametrize(("options", "expected"), REFUSED.items())
def test_options_that_contradict_each_other_are_refused(
    options: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(options, expected, capsys)


@pytest.mark.parametrize(
    "options",
    [
        "--optimizer.schedule linear --optimizer.min_lr_ratio 0.1",
        "--evaluation.every_steps 5 --data.eval_path e.jsonl",
        "--evaluation.every_steps 5 --data.held_out 0.1",
        "--evaluation.every_steps 5 --data.eval_split test",
        "--data.eval_path e --data.eval_split train",
        '--data.more_paths {"e.jsonl":0.5,"f.csv":2}',
        '--data.filters level={"min":2,"not":[3,null]} --data.filters language=["de","en"]',
        "--student.dtype bfloat16",
        "--rollout.dtype float16 --teacher.dtype float16",
        "--weight_sync.backend gloo --student.cuda_devices 1,0 --rollout.cuda_devices 2,1",
        "--weight_sync.backend nccl --student.cuda_devices 0 --rollout.cuda_devices 1",
        "--loss.single_step_estimator full --teacher.max_top_k 300",
        '--teacher_client.named maths=["http://a:1"] --data.teacher_column tutor',
        '--teacher_client.named maths=["http://a:1"] --teacher_client.urls ["http://b:1"]',
        '--teacher_client.named maths=["http://a:1"] --teacher_client.protocol vllm',  # every row may name one
        "--data.prompt_column teacher",  # a column like any other without teacher_client.named
    ],
)
def test_combinations_that_mean_something_are_taken(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_taken(options, capsys)


@pytest.mark.parametrize("role", ["train", "up"])
@pytest.mark.parametrize("option", ["every_steps", "num_prompts", "max_new_tokens"])
def test_options_of_an_evaluation_that_there_is_not_are_refused(
    role: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, role, *COMPLETE, f"--evaluation.{option}", "5")
    assert f"evaluation.{option} = 5 would be ignored: there is no data.eval_path" in line
    resolved(capsys, role, *COMPLETE, "--data.eval_path", "e", f"--evaluation.{option}", "5")
