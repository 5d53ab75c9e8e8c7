// void q1m_fiber_switch(void** save, void* load): the System V context switch.
// Saves the callee-saved registers on the running stack, its pointer in *save, and continues on
// `load`, a stack that an earlier call saved or that fiber_start() laid out.
    .text
    .globl q1m_fiber_switch
    .hidden q1m_fiber_switch
    .type q1m_fiber_switch, @function
q1m_fiber_switch:
    endbr64
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size q1m_fiber_switch, . - q1m_fiber_switch
    .section .note.GNU-stack, "", @progbits
