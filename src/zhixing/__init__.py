"""知行的验证引擎：找到每一个代码块，真的跑，核对，缓存，报告。

数据流（一条直线）：``blocks`` 找代码块 → ``execute`` 执行（``cache`` 决定谁不用跑）
→ ``page`` 把结果放回页面（``formula``、``diagram`` 在构建时渲染）→ ``report`` 汇总。

示例里只用这几个函数：:func:`figure` 存图，:func:`metric` 存数，:func:`output_path` 写产物文件，
:func:`input_path` 读上游示例的产物文件，:func:`scratch_path` 放断点续训的进度。
"""

from zhixing.artifacts import figure, input_path, metric, output_path, scratch_path

__all__ = ["figure", "input_path", "metric", "output_path", "scratch_path"]
